"""Chains of stages that Ray Data runs: one actor carries a unit the whole way."""
