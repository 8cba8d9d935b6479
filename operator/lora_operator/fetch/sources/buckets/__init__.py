"""Google Cloud Storage and Azure Blob Storage: the source, its checksums, and obstore's errors as reasons."""
