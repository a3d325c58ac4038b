"""The pool: a server that has imported the third-party packages and forks members and kernels; its slots; Ray."""
