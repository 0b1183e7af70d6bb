"""Training: one restartable loop, an optimiser, and the Specks objectives."""
