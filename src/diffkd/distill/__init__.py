"""The distiller: student, frozen teacher, pairs of layers, one method per pair."""
