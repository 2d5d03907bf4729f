"""What tests share: cases, oracles and stand-ins."""
