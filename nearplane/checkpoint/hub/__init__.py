"""A checkpoint on the model hub: its card, where the card's facts come from, and the upload."""
