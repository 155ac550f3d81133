"""This folder reads data that can only be iterated ahead on one rank, and deals them out to those who need them."""
