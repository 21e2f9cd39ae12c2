/* shapes.c - the launch shapes of cuda/ are plain C. */
#include "coding_rate_shape.h"
#include "depthwise_shape.h"
#include "panels_shape.h"
#include "rank_product_shape.h"
#include "rsgd_shape.h"
#include "sinkhorn_shape.h"

int shapes_are_c(void)
{
    return RATE_TILE + DEPTHWISE_THREADS + PANEL_BATCH + RANK_THREADS + RSGD_THREADS + SINKHORN_THREADS > 0;
}
