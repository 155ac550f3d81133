"""This room learns embeddings of texts, which are compared with all others of a step."""
