"""Agents over long contexts."""
