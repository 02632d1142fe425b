"""Figures of merit on feature arrays and waveforms."""
