"""elbozoo: latent-variable models on Pyro whose bounds are held against the truth."""
