"""A folder of documents as four tools: list, search, open and grep. Nothing outside the folder is read."""
