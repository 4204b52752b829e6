"""Tables, curves and pictures of finished runs."""
