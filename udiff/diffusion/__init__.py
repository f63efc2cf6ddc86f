"""Objectives and the algebra they are composed of."""
