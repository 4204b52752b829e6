"""Export of the plain student: weights and card, ONNX, an exported program."""
