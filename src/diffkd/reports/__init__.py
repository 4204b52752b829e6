"""Tables, curves and figures of finished runs."""
