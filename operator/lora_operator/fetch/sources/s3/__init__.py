"""S3 and what speaks its protocol. Nothing is imported here: `environment.prepare` comes before boto3."""
