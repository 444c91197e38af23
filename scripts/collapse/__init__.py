"""The collapse study: recordings, autoencoder, quantizers, conditions, runs and report."""
