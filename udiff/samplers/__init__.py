"""Samplers: coroutines that ask for a network's answer and know no network."""
