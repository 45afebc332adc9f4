"""The engine: requests, scheduling, blocks of keys and values, sampling, structured output."""
