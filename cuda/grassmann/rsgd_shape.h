/* rsgd_shape.h - how a class of k rows in R^n lies on a GPU. Plain C: the launcher and its tests share it.
 *
 * The columns of a class are cut among the blocks of a cluster, 1, 2, 4 or 8. Where a block's slice of the rows
 * [W; dir] (and M') fits into its shared memory it is kept there from the one read to the one write; else it passes
 * through in tiles, twice. Behind the tile lies the scratch of the k x k algebra, above SHARED_K in the workspace.
 */
#ifndef SUBSPACE_RSGD_SHAPE_H
#define SUBSPACE_RSGD_SHAPE_H
#include "shape.h"

enum {
    RSGD_THREADS = 256,
    RSGD_WARP_K = 8,         /* up to here one warp does the k x k algebra, above the block */
    RSGD_SHARED_K = 16,      /* up to here the k x k matrices are in shared memory */
    RSGD_MAX_K = 256,        /* dims of a class */
    RSGD_RAGGED_K = 64,      /* when they are ragged: the host does not know the largest */
    RSGD_RAGGED_GUESS = 8,   /* and makes room to keep classes of so many rows */
    RSGD_CLUSTER = 8,        /* the largest that every device with clusters has */
    RSGD_FULL = 3,           /* blocks on a multiprocessor, so that load, algebra and store of different ones overlap */
    RSGD_COLUMNS = 128,      /* of a tile of large k */
    RSGD_RESERVED = 1 << 10, /* of shared memory, by the system, for every block */
    RSGD_SCRATCH_BYTES = 64 << 20 /* of the workspace, at most */
};

typedef struct rsgd_rule {
    size_t item; /* bytes of a number */
    int blocks;  /* of k rows in the Gram matrix: W, dir and, where it differs and is needed, M' */
    int held;    /* of k rows to keep: M' is written at the end, and is dir or one more */
    int outputs; /* W, and M where it is transported or projected */
} rsgd_rule;

typedef struct rsgd_shape {
    int large;      /* the k x k matrices are in the workspace */
    int cluster;    /* blocks to a class */
    int kept;       /* a block's slice stays in shared memory */
    int per_sm;     /* blocks a multiprocessor has room for, at most RSGD_FULL are counted */
    size_t tile;    /* bytes; multiples of 16 */
    size_t scratch; /* bytes of shared memory behind the tile */
} rsgd_shape;

SHAPE_FN int64_t rsgd_round(int64_t value, int64_t to)
{
    return (value + to - 1) / to * to;
}

/* k with padding: a thread combines 4 or 8 rows at once. */
SHAPE_FN int64_t rsgd_padded(int64_t k)
{
    return k <= 4 ? 4 : rsgd_round(k, 8);
}

/* 4 x 4 blocks in the lower triangle of a Gram matrix. */
SHAPE_FN int rsgd_pairs(int rows)
{
    const int groups = (rows + 3) / 4;
    return groups * (groups + 1) / 2;
}

/* Into how many parts the columns go, for each of which 8 lanes sum a 4 x 4 block: such that `octets` groups of 8 lanes
 * share (parts x pairs) evenly. k = 4, 8, 16 and 256 threads: 30, 30 of 32 and 144 of 5 x 32. */
SHAPE_FN int rsgd_parts(int pairs, int octets)
{
    return 2 * pairs <= octets                         ? octets / pairs
           : 4 * pairs <= 3 * octets                   ? 3
           : pairs > octets && 2 * pairs <= 3 * octets ? 4
                                                       : 1;
}

/* Columns of a block of the cluster. */
SHAPE_FN int64_t rsgd_slice(int64_t n, unsigned cluster)
{
    int64_t slice = n + cluster - 1;
    for (; cluster > 1; cluster /= 2) slice /= 2; /* on a GPU a division of 64 bits takes longer */
    return rsgd_round(slice, 4);
}

SHAPE_FN int rsgd_matrices(const rsgd_rule *rule)
{
    return rule->outputs == 2 ? 13 : 10;
}

/* Doubles of one class's algebra: its Gram matrix by 4 x 4 blocks; coefficients and k x k matrices, or the parts of the
 * Gram matrix before; vectors. */
SHAPE_FN int64_t rsgd_scratch_of(int64_t k, const rsgd_rule *rule)
{
    const int64_t rows = rule->blocks * k, pairs = rsgd_pairs((int)rows);
    const int64_t parts = rsgd_parts((int)pairs, RSGD_THREADS / 8);
    const int64_t algebra = rule->outputs * rows * rsgd_padded(k) + rsgd_matrices(rule) * k * k;
    const int64_t sums = parts > 1 ? parts * pairs * 16 : 0;
    return pairs * 16 + rsgd_round((algebra > sums ? algebra : sums) + 5 * k + 2, 2);
}

/* The same for every class of up to k rows. */
SHAPE_FN int64_t rsgd_scratch(int64_t k, const rsgd_rule *rule)
{
    int64_t most = 0;
    for (int64_t i = k < RSGD_SHARED_K ? 1 : k; i <= k; i++) {
        const int64_t size = rsgd_scratch_of(i, rule);
        most = size > most ? size : most;
    }
    return most;
}

/* Bytes to keep a block's slice. */
SHAPE_FN int64_t rsgd_kept(int64_t k, int64_t n, unsigned cluster, const rsgd_rule *rule)
{
    return rsgd_round(rule->held * k, 4) * rsgd_slice(n, cluster) * (int64_t)rule->item;
}

/* Bytes of the least tile: the careful path's, in double, 2k rows beside those held; 32 columns for small k, else 4,
 * and two more against bank conflicts. */
SHAPE_FN int64_t rsgd_least_tile(int64_t k, const rsgd_rule *rule)
{
    return (rsgd_round(rule->held * k, 4) + 2 * k) * (k <= RSGD_SHARED_K ? 34 : 6) * 8;
}

/* The shape for classes of k rows in R^n, of up to k rows where they are ragged; 1 <= k <= n. `large` asks for that of
 * classes of more than SHARED_K rows. `clusters`: whether the device has them; `shared`: bytes a block may have. */
static inline rsgd_shape rsgd_shape_of(int64_t k, int64_t n, int ragged, int large, const rsgd_rule *rule, int clusters,
                                       int64_t shared)
{
    rsgd_shape s = {0, 0, 0, 0, 0, 0};
    const int64_t most_k = large || k < RSGD_SHARED_K ? k : (int64_t)RSGD_SHARED_K;
    const int64_t keep_k = ragged && !large && k > RSGD_RAGGED_GUESS ? (int64_t)RSGD_RAGGED_GUESS : most_k;
    const int64_t least = rsgd_least_tile(most_k, rule), scratch = large ? 0 : rsgd_scratch(most_k, rule) * 8;
    const int most = clusters && !large ? RSGD_CLUSTER : 1;
    s.large = large, s.scratch = (size_t)scratch;
    /* As few blocks as fill a multiprocessor; 8 only where 4 would leave it to one. The long algebra of large k
     * wants company more than it wants its rows kept. */
    for (int want = RSGD_FULL; want > (large ? 1 : 0); want--)
        for (int cluster = 1; cluster <= (want == RSGD_FULL && most > 4 ? 4 : most); cluster *= 2) {
            const int64_t kept = rsgd_kept(keep_k, n, (unsigned)cluster, rule), tile = kept > least ? kept : least;
            if ((tile + scratch + RSGD_RESERVED) * want > shared + RSGD_RESERVED) continue;
            s.cluster = cluster, s.kept = 1, s.per_sm = want, s.tile = (size_t)tile;
            return s;
        }
    const int64_t share = (shared + RSGD_RESERVED) / RSGD_FULL - RSGD_RESERVED - scratch;
    const int64_t wide = rsgd_round(rule->held * most_k, 4) * RSGD_COLUMNS * (int64_t)rule->item;
    const int64_t tile = large && wide < share ? wide : share / 16 * 16;
    s.cluster = most, s.per_sm = RSGD_FULL, s.tile = (size_t)(tile > least ? tile : least);
    return s;
}

#endif
