"""Loading models, turning messages into ids, response log-probs."""
