"""The frozen teacher: input transform, folded BatchNorms, feature cache, classifier."""
