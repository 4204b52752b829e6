"""How a model is read: its layers, their layouts and shapes, what they put out."""
