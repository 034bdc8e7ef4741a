"""Learning from a stream of rows: each is predicted, then learned from with one weight update, in bounded memory."""
