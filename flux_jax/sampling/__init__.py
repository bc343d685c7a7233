"""From conditioning to pixels."""
