/* A part of one JPEG tile, decoded with libjpeg-turbo. */

#ifndef JPEGTILE_H
#define JPEGTILE_H

#include "jpegscan.h"

#define TILE_ROWS 16 /* that libjpeg is asked for at a time: one by one costs a tenth of decoding */
#define TILE_SCANS 100 /* the most that a tile may have: cjpeg writes no more */

/* What a part needs, in pixels of the (reduced) tile, and its corner in the region. */
typedef struct {
    int64_t left, top, right, bottom, x, y;
} Place;

/* Everything that all tiles of a call share. */
typedef struct {
    unsigned char *pixels; /* uint8 [height, width, 3] */
    int64_t width, height;
    const unsigned char *tables;
    unsigned long tables_size;
    J_COLOR_SPACE colour;
    JDIMENSION tile_width, tile_height;
    unsigned int reduce;
    unsigned char *scratch; /* TILE_ROWS rows of a tile */
    Scan *scan;
    double until; /* s of tile_clock, when decoding is given up */
} Region;

/* TILE_STRANGE stays inside: libjpeg has to say. */
typedef enum { TILE_WHOLE, TILE_DAMAGED, TILE_STRANGE = SCAN_STRANGE, TILE_LATE } Verdict;

/* s of CPU time of this thread: what a tile takes of it does not hang on what else the machine does. */
double tile_clock(void);

/* Paints the part into its place in the region. `reason` is set where the tile is damaged; `again` counts tiles that were not plainly
   whole, so that libjpeg decoded them again. */
Verdict tile_paint(const Region *region, const unsigned char *data, size_t size, const Place *place, char reason[JMSG_LENGTH_MAX],
                   long *again);

#endif
