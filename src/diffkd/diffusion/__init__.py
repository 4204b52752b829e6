"""The mathematics of DiffKD: schedule, denoiser, noise adapter, autoencoder, passes, distances."""
