"""Several hosts: joined, agreed with each other, and shut down together."""
