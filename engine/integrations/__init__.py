"""Glue for trainers that keep a loss's state nowhere by themselves; docs/integrations.md has all.

Each module needs the trainer that it is named after, and nothing else imports it.
"""
