"""Trainers: each answers one question differently from TRL's, and says so."""
