"""Networks of the learned defenses and their discriminators; no plug-ins here.

All take and return float NCHW images in the range their training used; the defenses in front of them convert. A
`width` makes small versions of the same architecture.
"""
