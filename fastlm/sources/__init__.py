"""Where text and rows come from: files, packages, generators; their licences and digests."""
