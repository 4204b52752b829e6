"""The plain student as a file: weights and card, ONNX, an exported program."""
