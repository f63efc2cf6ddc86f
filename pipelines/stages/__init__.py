"""Stages: plain functions of a row, which refuse a row by raising `Refusal`."""
