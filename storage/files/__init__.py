"""The share: a mutable file system of which both nodes have each flushed byte."""
