/* shapes.c - the launch shapes of cuda/ are plain C. */
#include "grassmann/panels_shape.h"
#include "grassmann/rsgd_shape.h"
#include "rates/coding_rate_shape.h"
#include "transport/sinkhorn_shape.h"
#include "tucker/depthwise_shape.h"
#include "tucker/rank_product_shape.h"

int shapes_are_c(void)
{
    return RATE_TILE + DEPTHWISE_THREADS + PANEL_BATCH + RANK_THREADS + RSGD_THREADS + SINKHORN_THREADS > 0;
}
