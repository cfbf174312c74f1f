"""Placeholder until the tasks of the other part are here."""
