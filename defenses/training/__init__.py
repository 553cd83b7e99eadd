"""Training of the learned defenses: one loop (`loop`), losses (`losses`), what combines them (`objectives`, and
`generative` for generative models), what makes the adversarial images (`adversary`), and what all of it is called
(`recipe`). No plug-ins here.
"""

from defenses.training import generative as generative  # adds its objectives to those of `objectives`
