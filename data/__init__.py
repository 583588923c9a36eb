"""Data tools, run as modules: python -m data.prepare turns text files into token shards."""
