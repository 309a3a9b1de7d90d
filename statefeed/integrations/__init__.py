"""Callbacks for other packages' training loops; each module needs its package, and nothing else imports it."""
