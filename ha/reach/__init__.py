"""How clients reach the node that serves: addresses, fence, neighbours, share."""
