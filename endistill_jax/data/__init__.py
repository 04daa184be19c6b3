"""Text to batches: the offline corpus, vocabularies, span corruption and checkpointable iterators."""
