"""What training with fused tokens needs: attached modules and losses."""
