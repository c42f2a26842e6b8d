"""The learning problems a trial can be given."""
