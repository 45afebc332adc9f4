"""Raw text to clean text to token shards."""
