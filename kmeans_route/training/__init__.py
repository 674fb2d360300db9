"""What belongs to a training run: one commit an optimizer step, and its exchange between ranks."""
