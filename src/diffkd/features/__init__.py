"""Inspection of models: layers, their layouts and shapes, and recording of their outputs by hooks."""
