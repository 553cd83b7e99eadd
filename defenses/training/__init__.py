"""Training of the learned defenses: one loop (`loop`), losses (`losses`), what combines them (`objectives`), what makes
the adversarial images (`adversary`), and what all of it is called (`recipe`). No plug-ins here.
"""
