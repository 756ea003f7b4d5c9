"""How far influence scores can be believed."""
