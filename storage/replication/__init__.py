"""One log on two nodes: the pure core, links, routes, the follower."""
