"""Ray Train: start Ray on this machine or join a cluster, and train on its workers."""
