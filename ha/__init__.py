"""Who serves: etcd lease, decisions, virtual address, fence, Samba. Speaks to storage only over its control socket."""
